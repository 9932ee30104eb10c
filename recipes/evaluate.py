"""Evaluation of a model on mathematical benchmarks: `attn-trainers evaluate`, as a script.

python recipes/evaluate.py --model M --data FILE.jsonl --num_samples K
"""

from attn_trainers.commands.evaluate import main


if __name__ == "__main__":
    main()
