"""No name leads out of its folder."""

import pytest

from spin_diffusion.selfplay.run_settings import RunSettings
from spin_diffusion.store.input_error import InputError, file_name, leads_out

OUT = ["../..", "..", "a/../..", "/tmp/x", "C:\\x", "\\\\host\\x", "..\\x", "a\0b", "", "a\nb"]


@pytest.mark.parametrize(
    "name", [*OUT, ".", ".hidden", "a/b", "a\\b", " a", "a ", "a" * 201, "a:b", "\udce9", "a\x1b[2J", "*"]
)
def test_a_name_that_is_none_of_one_file_is_refused_in_one_line(name):
    with pytest.raises(InputError, match="the name becomes a file's") as caught:
        file_name(name, "--x")
    said = str(caught.value)
    assert "\n" not in said and len(said) < 200 and said.encode()


@pytest.mark.parametrize("name", [name for name in OUT if name not in ("", "a\nb")])
def test_a_path_that_leads_out_of_its_folder_is_known(name):
    assert not name or leads_out(name)


def test_names_and_paths_that_stay_are_taken():
    for name in ("spin-diffusion", "a b", "1.5", "\u732b", "a" * 200):
        assert file_name(name, "--x") == name and not leads_out(name)
    assert not leads_out("logs/tb")


@pytest.mark.parametrize("name", OUT)
def test_no_setting_leads_a_tracker_out_of_the_runs_folder(name):
    with pytest.raises(InputError, match="--tracker_project_name"):
        RunSettings(tracker_project_name=name)
