"""For `make lab`: every notebook that JupyterLab saves is cleaned first, so that a diff shows only what was
written; and JupyterLab asks no other host for anything."""

from pathlib import Path

from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter  # noqa: F821 (jupyter gives c)
# overrides.json there: no news, no search for updates, and no question about them
c.LabApp.app_settings_dir = str(Path(__file__).resolve().parent / "jupyter")  # noqa: F821
c.LabApp.extension_manager = "readonly"  # noqa: F821 (the other one lists what PyPI has)
