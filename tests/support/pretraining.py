"""A tool of scripts/pretrain with a tokenizer of few authors' texts; thousands take their time."""

import importlib
import sys

from absl import app

if __name__ == "__main__":
    tool = importlib.import_module(f"scripts.pretrain.{sys.argv.pop(1)}")
    tool.FOR_TOKENIZER = 20
    app.run(tool.main)
