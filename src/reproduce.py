"""Reproduce a table or figure of the paper: python src/reproduce.py --help"""

from __future__ import annotations

from amod.studies.command import check_reproduce, reproduce
from amod.training.command import launch

if __name__ == "__main__":
    launch(reproduce, "reproduce", check_reproduce)
