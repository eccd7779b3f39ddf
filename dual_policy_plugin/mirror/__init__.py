"""What `run/mirror.py` is made of: the storage, who may write to it, what it holds, how files go there and back."""
