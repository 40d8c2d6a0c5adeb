"""Code that never ends is ended, in any thread; code that ends is left alone."""

import sys
import threading
import time

import pytest

from spin_diffusion.store.deadline import Unending, fill_template, run_within
from spin_diffusion.store.input_error import InputError

FILE = "<somebody else's>"


def code(text: str):
    found: dict = {}
    exec(compile(text, FILE, "exec"), found)
    return found["run"]


LOOPS = {
    "a loop": "def run():\n while True:\n  pass",
    "calls": "def run():\n  def f(): return 0\n  return sum(f() for _ in iter(int, 1))",
    "a loop that catches what it can": "def run():\n while True:\n  try:\n   len(5)\n  except TypeError:\n   pass",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("in_a_thread", [False, True])
def test_what_never_ends_is_ended(text, in_a_thread):
    found = []

    def run() -> None:
        before, started = sys.gettrace(), time.thread_time()
        try:
            run_within(0.3, 4.0, FILE, code(text))
        except Unending as error:
            found.append((str(error), time.thread_time() - started, sys.gettrace() is before))

    if in_a_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    ((said, took, is_restored),) = found
    assert said == "it takes more than 0.3 s" and took < 5 and is_restored


@pytest.mark.timeout(60)
def test_what_fills_the_memory_is_ended():
    doubles = code("def run():\n x = 'a' * 1000\n while True:\n  x = x + x")
    with pytest.raises(Unending, match=r"more than 0\.25 GiB of memory"):
        run_within(50.0, 0.25, FILE, doubles)


def test_time_in_which_others_have_the_processor_does_not_count():
    assert run_within(0.2, 4.0, FILE, code("def run():\n import time\n time.sleep(0.5)\n return len('ab')")) == 2


def test_what_ends_returns_or_raises_as_ever():
    assert run_within(5.0, 1.0, FILE, code("def run():\n return sum(range(10))")) == 45
    with pytest.raises(ZeroDivisionError):
        run_within(5.0, 1.0, FILE, code("def run():\n return 1 / 0"))


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "template", ["{{ 9 ** 9 ** 9 }}", "{% set x = messages|length %}{%- if x ** 99 ** 9 %}{% endif %}"]
)
def test_a_template_with_a_power_is_refused_before_it_is_filled(template):
    with pytest.raises(InputError, match=r"\(\*\*\)"):
        fill_template(template, lambda: pytest.fail("it was filled"))


@pytest.mark.parametrize("template", ["**bold** {{ 2 * 3 }} {# ** #} {{ '**' }}", "{% generation %}", "{{ broken"])
def test_stars_that_are_text_and_what_jinja_does_not_know_pass(template):
    assert fill_template(template, lambda: "filled") == "filled"
