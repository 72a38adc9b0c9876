"""Studies that compare several runs of the library. README.md says how to start, resume and report one."""
