"""Speed, memory and recovery, measured on the machine at hand."""
