"""Other libraries' models on fastpeft's ops: Hugging Face PEFT (`peft.py`), and transformers' 4-bit models."""
