"""The data set: little pictures of cloth, after twelve African textile traditions.

They are drawings in homage, made with a few lines of arithmetic; they are not authentic textiles,
and what the real cloths mean to the people who make and wear them is not in them. The function of
each tradition names the cloth, its makers and a book to begin with.

__main__       `python -m ddpm_basics.fabrics`: the options
folder         a folder on disk, of drawn fabrics or of photographs: claimed, completed on all cores
manifest       manifest.json, which says what a folder holds
drawing        one fabric as a pure function of (seed, split, index); the list of traditions
cloth          the cloth to draw on, its yarn, and the light that falls on it
shapes         cells, stripes, rings, petals and the rest that the traditions share
colour         sRGB, OKLab and dyes
adinkra, adire, aso_oke, bogolan, fugu, kanga, kente, korhogo, kuba, ndebele, shweshwe, wax_print
               one tradition each: its dyes, its figures, its drawing
"""
