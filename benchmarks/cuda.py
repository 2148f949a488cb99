"""LoRA steps on one GPU against PEFT, Liger, Unsloth and the frozen floor; on_cuda.py says how.

python benchmarks/cuda.py --minutes 6 --out cuda.json        # needs torch and transformers; peft for PEFT's rows
python benchmarks/cuda.py --device cpu --quick               # tries the script itself, in seconds
"""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BEFORE = list(sys.path)
sys.path[:] = [place for place in sys.path if Path(place).resolve() != FOLDER]

if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))  # so that the package is found without being installed
    from benchmarks.on_cuda import main

    main()
elif __name__ == "cuda":  # a script beside this one is running, and someone asks for NVIDIA's package of that name
    del sys.modules["cuda"]
    try:
        sys.modules["cuda"] = importlib.import_module("cuda")
    finally:
        sys.path[:] = BEFORE  # the scripts beside this one import one another
