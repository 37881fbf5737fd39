"""`make audit`: an answer is reported, and no answer is never taken for a good one."""

import importlib.util
import json
from pathlib import Path

import pytest

file = Path(__file__).parents[1] / "tools" / "audit.py"
spec = importlib.util.spec_from_file_location("audit", file)
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

GOOD = {"name": "attrs", "version": "26.1.0", "vulns": []}
BAD = {"name": "old", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}
LOST = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


@pytest.mark.parametrize(
    "answer, code, out, err",
    [
        ([GOOD], 0, "No known vulnerability in 1 versions.", ""),
        ([GOOD, BAD], 1, "old 1.0: CVE-1, mended in 1.1", ""),
        ([GOOD, LOST], 2, "", "not audited: the service knows nothing of 1 of 2 versions (torch)."),
        ([BAD, LOST], 2, "old 1.0: CVE-1", "not audited"),
        (None, 2, "", "not audited: pip-audit gives no answer (no route to host)."),
    ],
)
def test_what_pip_audit_says(tmp_path, capsys, answer, code, out, err):
    tool = tmp_path / "pip-audit"
    lines = ["import json, sys", "print('no route to host.', file=sys.stderr)"]
    if answer is not None:
        lines += ["place = sys.argv[sys.argv.index('--output') + 1]"]
        lines += [f"open(place, 'w').write({json.dumps(json.dumps({'dependencies': answer}))})"]
    tool.write_text("\n".join(["#!/usr/bin/env python3", *lines]))
    tool.chmod(0o755)
    assert audit.main(tool, "constraints.txt") == code
    said = capsys.readouterr()
    assert out in said.out and err in said.err and said.err.count("\n") == bool(err)


def test_where_it_cannot_be_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit, "place", tmp_path / "file" / "audit")
    (tmp_path / "file").write_text("")
    assert audit.main() == 2
    assert capsys.readouterr().err.startswith("The pinned versions were not audited: pip-audit")
