"""One page a run or a sweep: ``report.html`` in its folder, a file that needs no other and no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from lora_lightning.reports.page.about import AboutRun
    from lora_lightning.reports.page.folder import is_run
    from lora_lightning.reports.page.near import neither
    from lora_lightning.reports.page.run import run_page, try_page
    from lora_lightning.reports.page.sweep import sweep_page, try_sweep_page

_HOMES = {
    "AboutRun": "about",
    "is_run": "folder",
    "neither": "near",
    "run_page": "run",
    "sweep_page": "sweep",
    "try_page": "run",
    "try_sweep_page": "sweep",
}

__all__ = ["AboutRun", "is_run", "neither", "run_page", "sweep_page", "try_page", "try_sweep_page"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
