"""For `make lab`: every notebook that JupyterLab saves is cleaned first, so that a diff shows only what was written."""
from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter  # noqa: F821 (jupyter gives c)
