"""What depends on the platform: the form of an operation that each backend compiles and runs well.

Nothing outside this package asks which platform it runs on.
"""
