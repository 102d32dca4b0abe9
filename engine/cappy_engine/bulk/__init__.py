"""Score or rank the rows of whole files, window by window. Start at `score_file`.

A job is said by `tasks` (score or rank), `row_options` and `input_files`. `formats` reads rows, `windows` gathers them,
`file_windows` tokenises them ahead, `work` scores and counts them (`totals`), and `formats` makes bytes of them. `runs`
writes these into files that appear when they are complete: `output` writes a file whole or not at all, and `resume`
goes on after a stop. `folders` takes files into a folder, and `ray` takes them to a cluster.
"""
