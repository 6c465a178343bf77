"""Model folders in Hugging Face's layout, and the run folders that hold them."""
