"""Write an adapter for others, with a model card: python scripts/export.py adapter folder [--vllm|--gguf]."""

from lora_lightning.cli.export import main

if __name__ == "__main__":
    main()
