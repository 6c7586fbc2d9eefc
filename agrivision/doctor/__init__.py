"""What a machine and its cluster can do, looked at one thing at a time, with what to do about each.

Each check takes what it judges as an argument, so that a test can hand it any machine; next to it
stands what reads that off this one.
"""
