"""What changes weights or inputs before quantization and leaves the float output as it was."""
