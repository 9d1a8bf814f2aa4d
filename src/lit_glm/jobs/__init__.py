"""How ranks start, are watched, and end.

Runs a job: `launch` decides where, `agent` is torchrun, `worker` and `outer` are a rank's entry, `build` makes what it
needs, `rank` trains and concludes, `loggers` has its curves · many: `sweep_start`, `sweep`, `summary` · watches it:
`signs` of life, `watch` over silence, `lifeline` between nodes · meets: `nodes`, `group` · ends: `interrupts`, `stops`.
"""
