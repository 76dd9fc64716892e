"""One public function per operation on tensors; a faster version replaces one file."""
