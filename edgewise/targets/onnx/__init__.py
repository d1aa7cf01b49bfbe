"""What all targets share whose artifact is an ONNX file: from an exported program to the model, and to the file."""
