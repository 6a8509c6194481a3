"""Other trainers' ways to save and restore, over asyncckpt; one file each, which alone imports that trainer's package.

Nothing in asyncckpt imports them. Stands last in the import order: they may use everything else.
"""
