"""Platform-dependent code: each operation in the form that a backend compiles and runs well.

Nothing outside this package asks which platform it runs on.
"""
