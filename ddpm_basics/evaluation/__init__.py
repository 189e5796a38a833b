"""How good is a folder of samples? `python -m ddpm_basics.evaluation SAMPLES_DIR` measures it.

folders    read folders of images; find, draw and split held-out ones
copies     nearest training images, and which samples are copies of them
features   what is compared: pixels, patches, random convolutions, a tradition classifier
distances  how it is compared: sliced Wasserstein, Fréchet, kernel; random splits
inception  FID, KID and the Inception Score, through torch-fidelity
shares     traditions among the samples, corrected for the classifier's errors; colours
intervals  95 % intervals of shares and resampled figures
report     definitions, the figures that decide, printed tables, the picture
__main__   options, and the evaluation from beginning to end
"""
