"""A run folder and everything that is known of it from outside: who writes it, who reads it, and how it stands.

`job` what is run · `folder` the folder is taken or refused · `lock` by one process at a time · `live` its tables while
the run goes · `result` how it stands and ended · `row` that as a line of the table · `errors` what went wrong in which
rank · `checkpoints` what it goes on from · `find` where earlier runs are.
"""
