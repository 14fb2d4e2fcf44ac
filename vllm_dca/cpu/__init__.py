"""DCA on the CPU: one compiled kernel for everything, and torch where there is no compiler."""
