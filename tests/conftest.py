from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small tests gain nothing from threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import signal

import pytest
import torch

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # of `nohup` or `&`; the runs that tests start would ignore it, too
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
