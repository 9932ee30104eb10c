"""What a model's attention says about its own responses: `attn-trainers inspect`, as a script.

python recipes/inspect_attention.py --model M --data FILE.jsonl
"""

from attn_trainers.commands.inspect import main


if __name__ == "__main__":
    main()
