"""What PEFT lacks, or does otherwise than a quantised base needs: tuners of its own kind, which register themselves."""
