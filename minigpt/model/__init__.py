"""The models, in torch only: this package opens no files and prints nothing."""
