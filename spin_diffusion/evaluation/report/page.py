"""What all pages have: a template, the style, and a policy that forbids whatever is not this program's own.

Names, prompts and reasons are text that anybody may have written: a template escapes every one of them.
"""

import base64
import functools
import hashlib
from importlib import resources

import jinja2
from markupsafe import Markup

from spin_diffusion.evaluation.report.wording import clean


@functools.cache
def environment(package: str) -> jinja2.Environment:
    """What makes the templates of a package."""
    return jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(functools.partial(asset, package=package)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # The one place through which all text goes; what is Markup is this program's own
        finalize=lambda value: clean(value) if type(value) is str else value,
    )


def asset(name: str, package: str = __package__ or "") -> Markup:
    """The text of a file of a package, by default of this one."""
    return Markup(resources.files(package).joinpath(name).read_text(encoding="utf-8"))


def dress(script: str | None = None) -> dict[str, str]:
    """`css`, `js` and the `policy` that allows them alone, by their hashes; a page with a script has pictures too."""
    css, js = asset("style.css"), Markup() if script is None else asset(script)
    allowed = f"style-src '{_hash(css)}'; " + (f"script-src '{_hash(js)}'; " if script else "")
    pictures = "img-src data:; " if script else ""
    policy = f"default-src 'none'; {pictures}{allowed}base-uri 'none'; form-action 'none'"
    return {"css": css, "js": js, "policy": policy}


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
