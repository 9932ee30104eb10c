"""Find a model's key-focus heads for AttnPO: `attn-trainers heads`, as a script.

python recipes/find_key_focus_heads.py --model M --data FILE.jsonl
"""

from attn_trainers.commands.heads import main


if __name__ == "__main__":
    main()
