"""Faults on purpose: kills at file operations and times, of Ray's processes, full disks; does any of them do harm?"""
