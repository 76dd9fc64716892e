"""Makes adapters: low-rank fine-tuning on the very NF4 base that the server keeps."""
