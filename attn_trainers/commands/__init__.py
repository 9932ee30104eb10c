"""The commands of `attn-trainers`: a `main(argv)` each."""
