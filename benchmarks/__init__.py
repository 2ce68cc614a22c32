"""What imagend costs beside the pipeline's own time, as ratios and differences within one run."""
