"""The libraries are imported without what nothing needs of them, and everything works all the same."""

import gc
import importlib
import os
import subprocess
import sys

import pytest
from controlnet.model.work.libraries import Later, hidden
from controlnet.preprocessors.imports import uncollected


def python(text: str) -> str:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_start_imports_no_more_than_it_needs():
    """And a spacing of steps that needs scipy, a scheduler that does, and peft work afterwards."""
    out = python(
        "import gc, sys\n"
        "from controlnet.model.work.machine import silence_libraries\n"
        "silence_libraries()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "import controlnet.model.work.studio\n"
        "print([m for m in ('scipy.optimize', 'scipy.stats._stats_py', 'peft', 'bitsandbytes') if m in sys.modules])\n"
        "from diffusers import EulerDiscreteScheduler, LMSDiscreteScheduler\n"
        "euler = EulerDiscreteScheduler(use_beta_sigmas=True)\n"
        "for scheduler in (LMSDiscreteScheduler(), euler):\n"
        "    scheduler.set_timesteps(5)\n"
        "import controlnet.model.adapters.lora, scipy.stats._stats_py, scipy.stats\n"
        "print(len(euler.sigmas), scipy.stats.norm.cdf(0))\n"
    )
    assert out.splitlines()[-2:] == ["[]", "6 0.5"]


def test_hidden_modules_cannot_be_imported_while_it_lasts():
    name = "xml.dom.pulldom"
    sys.modules.pop(name, None)
    with hidden(name, "json"):
        assert importlib.import_module("json")  # was there already
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert importlib.import_module(name)


def test_a_module_for_later_is_imported_when_it_is_asked(monkeypatch):
    name = "xml.dom.pulldom"
    monkeypatch.setitem(sys.modules, name, Later(name))
    stand_in = sys.modules[name]
    assert not hasattr(stand_in, "__file__") and sys.modules[name] is stand_in
    assert stand_in.START_DOCUMENT == "START_DOCUMENT" and sys.modules[name] is not stand_in


def test_nothing_imported_is_looked_at_as_garbage():
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        raise ImportError("a library that is not there")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("given, spins", [
    ({}, "1000"),
    ({"OMP_WAIT_POLICY": "active"}, None),
    ({"GOMP_SPINCOUNT": "7"}, "7"),
], ids=["nothing", "a policy", "a count"])  # fmt: skip
def test_threads_that_wait_leave_the_core_to_others(run, monkeypatch, given, spins):
    """Unless the environment says how they wait."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run("--version")[0] == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins
