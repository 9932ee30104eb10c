"""Has attention branching anything to say on a model and its data? See `attn_trainers.commands.branching`.

python recipes/probe_branching.py --model Qwen/Qwen2.5-1.5B-Instruct --data problems.jsonl
"""

from attn_trainers.commands.branching import main


if __name__ == "__main__":
    main()
