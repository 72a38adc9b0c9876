"""Studies: several runs of the library, compared. README.md says how to start, resume and report one."""
