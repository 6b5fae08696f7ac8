"""What launch.doctor looks at: reach (ssh), facts (of a host), network (between hosts), verdicts (what is wrong)."""
