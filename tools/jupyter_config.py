"""For `make lab`: every notebook that JupyterLab saves is cleaned first, so that a diff shows only what was written; and it asks no other host for anything."""
from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter  # noqa: F821 (jupyter gives c)
c.LabApp.news_url = None  # noqa: F821 (no news, and no question whether to fetch them)
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"  # noqa: F821
c.LabApp.extension_manager = "readonly"  # noqa: F821 (the other one lists what PyPI has)
