"""Ask which versions of constraints.txt have known vulnerabilities.

    python tools/audit.py     exit 0: none has; 1: some have, and are listed; 2: it could not be asked

It runs pip-audit in an environment of its own, .venv/audit, so that the tested one stays as it is. Where its service
does not know a version, pip-audit skips it and is content; here that is no answer.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "2.10.1"
root = Path(__file__).resolve().parents[1]
place = root / ".venv" / "audit"


def install():
    "Install pip-audit where it is not there yet; say in a sentence why that fails."
    tool = place / "bin" / "pip-audit"
    if tool.exists():
        return tool
    pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet", f"pip-audit=={VERSION}"]
    for command in ([sys.executable, "-m", "venv", place], pip):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip-audit {VERSION} cannot be installed ({last_line(done.stderr)})")
    return tool


def last_line(text):
    return (text.strip().splitlines() or ["it says nothing"])[-1].rstrip(".")


def ask(tool, pinned):
    "Run pip-audit on pinned versions; give its answer, one entry a version."
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        how = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--output", answer]
        done = subprocess.run([tool, "--requirement", pinned, *how], capture_output=True, text=True)
        try:
            return json.loads(answer.read_text())["dependencies"]
        except (OSError, ValueError, KeyError):
            raise RuntimeError(f"pip-audit gives no answer ({last_line(done.stderr)})") from None


def report(answer):
    "Print what is known; give the exit code."
    unknown = [each["name"] for each in answer if "skip_reason" in each]
    found = [each for each in answer if each.get("vulns")]
    for each in found:
        for fault in each["vulns"]:
            fixed = ", ".join(fault["fix_versions"]) or "no version yet"
            print(f"{each['name']} {each['version']}: {fault['id']}, mended in {fixed}")
    if unknown:
        some = ", ".join(unknown[:3]) + (" and others" if len(unknown) > 3 else "")
        raise RuntimeError(f"the service knows nothing of {len(unknown)} of {len(answer)} versions ({some})")
    if not found:
        print(f"No known vulnerability in {len(answer)} versions.")
    return 1 if found else 0


def main(tool=None, pinned=root / "constraints.txt"):
    try:
        return report(ask(tool or install(), pinned))
    except RuntimeError as error:
        print(f"The pinned versions were not audited: {error}. Try again where PyPI can be reached.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
