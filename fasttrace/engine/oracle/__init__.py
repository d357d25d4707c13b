"""The truth that every fast path is held equal to: plain hooks on the user's own modules, one run at a time.

Written to be obviously right, not to be quick. Nothing that the fast engines compute with is imported here: requests
are plain data, and what one patch does to one value is the definition that all share,
`fasttrace.engine.values.apply_patch`.
"""
