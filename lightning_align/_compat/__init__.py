"""Every private API of other libraries that we touch, with a test each.

The name of a file begins with the library whose private parts it touches; ``torch_*`` never
imports Lightning, and only the command line knows ``jsonargparse_*``. When one of them changes, its
test names it before a user meets it.
"""
