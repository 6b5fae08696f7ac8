"""What launch.doctor looks at.

`reach` asks ssh. `facts` describes a host, `network` measures between hosts, and both fill the
records of `measurements`. `job` starts `rank` on every host. `verdicts` says what is wrong,
`report` prints it.
"""
