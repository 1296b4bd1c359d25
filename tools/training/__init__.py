"""What `train_packaged_model.py` and `check_packaged_model.py` share: text, tasks, the loop, export."""
