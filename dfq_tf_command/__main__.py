"""`python -m dfq_tf_command` is `dfq-tf`."""

from dfq_tf_command import main

main()
