"""Stands in for a training, `python training.py STATE LAST`: counts to LAST, saves at SIGTERM, goes on from STATE."""

import signal
import sys
import time
from pathlib import Path

state, last = Path(sys.argv[1]), int(sys.argv[2])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
step = int(state.read_text()) if state.exists() else 0
print(f"from step {step}", flush=True)
while step < last:
    time.sleep(0.02)
    step += 1
    if asked:
        break
state.write_text(str(step))
print(f"at step {step}", flush=True)
