"""Hundreds of bad inputs (cases.py): each ends in an error that says what to do, or works; none in a traceback, and
nothing half-written stays."""

import collections
import os

import pytest
from controlnet.cli.main import main
from controlnet.preprocessors.errors import Exit
from hostile.cases import Models, cases

AT_LEAST = 600


def test_hostile_inputs(small_base_folder, tmp_path, monkeypatch, capsys):
    only = os.environ.get("HOSTILE", "")
    counts: collections.Counter = collections.Counter()
    failures = []
    for number, case in enumerate(cases(Models(small_base_folder))):
        if only not in case.name:
            continue
        folder = tmp_path / f"{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        args = case.prepare(folder)
        try:
            with pytest.raises(SystemExit) as stopped:
                main(args)
            code = stopped.value.code or 0
        except BaseException as error:
            code, told = Exit.BUG, f"{type(error).__name__}: {str(error)[:300]}"
            if only:
                raise
        else:
            told = "".join(capsys.readouterr())
        counts[Exit(code).name] += 1
        left = list(folder.rglob("*.tmp"))
        if code == Exit.BUG or left or (code not in (0, Exit.DIFFERENT) and "error" not in told.lower()):
            failures.append(f"{case.name} ({' '.join(args[:2])}): {told[-300:]} {left or ''}")
        capsys.readouterr()
    print(dict(counts))
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures)
    assert only or sum(counts.values()) >= AT_LEAST
    assert only or counts["OK"] < 0.35 * sum(counts.values())  # most are bad in truth
