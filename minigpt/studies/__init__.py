"""What the textbooks say of attention, measured."""
