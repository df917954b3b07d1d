"""The loss of a checkpoint in stock transformers: a process that knows nothing of this repository.

    python scripts/stock_loss.py CHECKPOINT SAMPLES.json RESULT.json

SAMPLES: {"input_ids": [[...]], "shift_labels": [[...]]}, the next token of each position, -100 for none.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    checkpoint, samples, result = map(Path, sys.argv[1:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").to(device).eval()
    total, labels = 0.0, 0
    rows = json.loads(samples.read_text())
    with torch.no_grad():
        for tokens, following in zip(rows["input_ids"], rows["shift_labels"], strict=True):
            logits = model(torch.tensor([tokens], device=device)).logits[0].float()
            wanted = torch.tensor(following, device=device)
            total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            labels += int((wanted != -100).sum())
    assert not any(name.split(".")[0] == "neox_hf" for name in sys.modules), "this was not stock transformers alone"
    result.write_text(json.dumps({"loss": total / labels, "class": f"{type(model).__module__}.{type(model).__name__}"}))


if __name__ == "__main__":
    main()
