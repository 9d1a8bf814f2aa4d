"""Run folders: everything that is written to them and read from them.

Job (`job_spec`), exclusive access (`run_folder`), tables (`run_writer`), result and error files (`result`), machine and
software (`environment`), checkpoints (`checkpoints`), and earlier runs (`discovery`).
"""
